"""Which arm gets whose requests, and what is made of what it did with them."""
