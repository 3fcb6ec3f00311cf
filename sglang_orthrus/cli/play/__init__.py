"""`python -m sglang_orthrus play`: one page that shows a request answered by plain SGLang and by ORTHRUS."""
