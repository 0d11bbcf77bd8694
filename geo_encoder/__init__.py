"""GCIM, the Geographic Coordinate Injection Module (paper, Section 3.2): coordinates in, LLM embeddings out."""
import ga_llm  # noqa: F401 (before transformers and peft, which it prepares for)
