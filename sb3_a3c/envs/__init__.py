"""A worker's share of the user's vectorised environment."""
