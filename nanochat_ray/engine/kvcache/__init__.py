"""Keys and values of running sequences, and which memory holds them."""
