"""Makes a trained model small, and prices each choice: a workdir and a recipe -> a smaller workdir."""
