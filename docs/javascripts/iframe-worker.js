/* Lets the search box work when the site is opened from a folder.
 *
 * The theme searches in a Web Worker, and browsers start none from file:// addresses. Here an invisible frame runs
 * the same script instead. The name of this file matters: the theme's plugin `offline` would otherwise load a script
 * of that name from the network.
 */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #waiting = [];
    #ready = false;

    constructor(url) {
      super();
      this.#frame.hidden = true;
      const begin = () => {
        document.body.append(this.#frame);
        const inside = this.#frame.contentWindow;
        // A worker posts to its owner; a window would post to itself.
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = this.#frame.contentDocument.createElement("script");
        script.src = new URL(url, document.baseURI).href;
        script.onload = () => {
          this.#ready = true;
          this.#waiting.splice(0).forEach((data) => this.postMessage(data));
        };
        this.#frame.contentDocument.body.append(script);
      };
      if (document.body) begin();
      else addEventListener("DOMContentLoaded", begin);
    }

    postMessage(data) {
      if (!this.#ready) {
        this.#waiting.push(data);
        return;
      }
      const inside = this.#frame.contentWindow;
      inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
