"""The top floor: parse, call, print."""
