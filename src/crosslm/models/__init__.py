"""The LLM, the SLM and the sentence encoder over transformers, peft and sentence-transformers, and their speed."""
