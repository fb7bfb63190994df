"""Host side: numpy only. From files on disk to batches of static shape."""
