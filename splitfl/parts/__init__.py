"""A part of a model: the client's ends or the server's trunk, as the Hugging Face model with modules left out."""
