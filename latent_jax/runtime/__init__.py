"""What a run needs whatever its method: sharding, checkpoints, metrics, preemption, FLOPs."""
