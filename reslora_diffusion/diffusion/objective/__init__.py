"""The objective: noise, its schedule, the loss, and the random numbers that all of it is a function of."""
