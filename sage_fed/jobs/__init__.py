"""One job's life: admission, hold, stages, delivery, settlement."""
