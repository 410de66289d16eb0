"""`meds plan`: what a run puts on each GPU, whether it fits, what it sends and how long it takes. Pure Python over
shapes; imports no torch."""
