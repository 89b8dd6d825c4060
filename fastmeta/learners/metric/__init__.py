"""Learners that adapt by comparing embeddings."""
