"""SGLang's out-of-tree platform seam for a plain x86-64 Linux CPU, in pure PyTorch."""
