"""Writing text with a trained model: sampling through the recurrent state, prompts from files and people."""
