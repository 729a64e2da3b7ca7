// Embeds a cohort in parts, lists and checks the store, and predicts maps where a model is given.
//
//   nextflow run deploy/nextflow -profile docker --samples /data/cohort.csv --store /data/store --mount /data
//   nextflow run deploy/nextflow -profile apptainer,slurm,gpu --samples ... --store ... --parts 16 --encoder uni2-h
//
// The same command again computes only what is missing, with and without -resume.
nextflow.enable.dsl = 2

include { HISTOSGE_EMBED; HISTOSGE_VALIDATE; HISTOSGE_PREDICT } from './modules/histosge'

workflow {
    if (!params.samples || !params.store) {
        error "give --samples (a sample sheet, a folder or a slide) and --store (a folder or URL)"
    }
    HISTOSGE_EMBED(channel.of(0..(params.parts as int) - 1), params.samples, params.store)
    // After all parts: each writes other slides of the same store.
    HISTOSGE_VALIDATE(params.store, HISTOSGE_EMBED.out.log.collect())
    if (params.model) {
        if (!params.maps) {
            error "give --maps, the folder or URL where maps are written"
        }
        HISTOSGE_PREDICT(params.store, params.model, params.maps, HISTOSGE_VALIDATE.out.report)
    }
}
