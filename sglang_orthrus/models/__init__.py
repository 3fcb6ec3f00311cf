"""Model classes that SGLang's registry finds here (`SGLANG_EXTERNAL_MODEL_PACKAGE`)."""
