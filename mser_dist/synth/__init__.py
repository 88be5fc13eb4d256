"""Makes emotional speech with eSpeak NG, as shards."""
