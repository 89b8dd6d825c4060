"""Speed of the working tree over the speed of an earlier revision, workload by workload."""
