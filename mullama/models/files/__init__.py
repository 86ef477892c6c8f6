"""What model files say of themselves: headers, shapes, sizes, importance matrices, LoRA files. No compiled code."""
