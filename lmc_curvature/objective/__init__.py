"""What is the loss at a state?"""
