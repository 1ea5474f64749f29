"""bertops inside other libraries: one file a library, imported only on request."""
