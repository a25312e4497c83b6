"""Where the slots of a layer lie among the ranks of a request, and how a prompt and a token are attended there."""
