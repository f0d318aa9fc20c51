"""What the three backends share, and what compares them; imports no framework, ever."""
