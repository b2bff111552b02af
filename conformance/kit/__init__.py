"""The vendor's kit: what `core new-backend` writes."""
