"""What a model can do, asked of the model itself."""
