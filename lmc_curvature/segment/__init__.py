"""What lies between two networks?"""
