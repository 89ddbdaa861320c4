"""Text generation with a trained model: sampling through the recurrent state, prompts from files or a terminal."""
