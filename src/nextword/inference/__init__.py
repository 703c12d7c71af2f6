"""Inference: the generation engine, model runners, sampling, perplexity and log-likelihoods."""
