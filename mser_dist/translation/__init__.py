"""Carries recorded emotion into other languages: words by another, prosody from the recording."""
