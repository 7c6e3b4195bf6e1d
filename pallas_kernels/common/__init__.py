"""What every operation shares: the formats, their codecs, and how an implementation is chosen."""
