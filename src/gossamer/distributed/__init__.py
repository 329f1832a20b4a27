"""More than one machine: replicas, jobs and matrices that are spread over several processes."""
