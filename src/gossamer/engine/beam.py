def beam_search(*a): raise 1
