"""GCIM, the Geographic Coordinate Injection Module (paper, Section 3.2): coordinates in, LLM embeddings out."""
