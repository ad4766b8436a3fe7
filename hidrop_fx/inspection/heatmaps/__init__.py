"""Heat maps of filter layers' scores over the image."""
