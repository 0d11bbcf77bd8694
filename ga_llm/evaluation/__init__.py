"""From a checkpoint to metrics: loading it, ranking every POI exactly, baselines, protocols, comparisons."""
