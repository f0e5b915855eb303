"""Where images come from: sources, and the pipeline that turns them into batches."""
