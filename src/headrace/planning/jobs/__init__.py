"""Many requests or drafts in a pass: how passes are packed, and how long that takes."""
