"""What an evaluation says, and how sure it is: figures, intervals by cluster, results."""
