"""How one dataset is made of many sources: the steps, and the engines that run them."""
