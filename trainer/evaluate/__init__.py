"""A verdict on a model, teacher beside student: what it is worth on labels, masks and images, and what it costs."""
