"""From a trained model to what is published: the line from base to tuned, merging, artifacts."""
