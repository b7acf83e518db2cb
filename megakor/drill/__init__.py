"""A fire drill: does a run on these machines survive what will befall it?"""
