"""Evaluators of others over a compiled model: lmms-eval's model classes and VLMEvalKit's, over one way of answering."""
