"""`hieratok app`: a page in the browser that shows what a tokenizer keeps of a photo, coarse to fine."""
