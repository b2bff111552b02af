"""From a scheduled step to the device: batches, buckets, programs."""
