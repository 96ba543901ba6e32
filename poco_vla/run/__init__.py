"""What every part of a run shares: its folder, its log, requests to stop. :mod:`context` holds them together."""
