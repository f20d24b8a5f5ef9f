"""Pictures: a medical image file in, what a viewer shows of it out."""
