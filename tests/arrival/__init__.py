"""Where the value of every implemented key must arrive: tables by area, and what the commands make of a YAML on the way."""
