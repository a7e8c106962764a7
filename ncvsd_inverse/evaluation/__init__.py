"""How close a prior is to its teacher, and how good the images are that it generates."""
