"""Models and weights that `--model` and `--weights` name, and the embedded demo."""
