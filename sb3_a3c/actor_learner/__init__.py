"""Algorithm S3 of the paper in one process: pull, act, learn, push."""
